from fedsoda_edge.worker.worker import main

main()
