"""`python -m dualtoken_vit`: the installed command."""

from dualtoken_vit_command import main

if __name__ == "__main__":
    main()
