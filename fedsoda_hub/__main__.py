from fedsoda_hub.cli import main

main()
