from longtake.infra.cli import main

main()
