"""`python -m cai` is `cai`."""

from cai.cli.main import main

if __name__ == "__main__":
    main()
