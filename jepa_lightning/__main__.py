"""`python -m jepa_lightning`."""

from jepa_lightning.cli import main

if __name__ == "__main__":
    main()
