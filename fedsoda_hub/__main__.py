from fedsoda_hub.cli.commands import main

main()
