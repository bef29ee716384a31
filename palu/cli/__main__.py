from palu.cli import main

main()
