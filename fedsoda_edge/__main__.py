from fedsoda_edge.cli.commands import main

main()
