from palu.integrations.open_unlearning.launch import main

main()
