from fedsoda_edge.cli import main

main()
