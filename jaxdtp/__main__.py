"""`python -m jaxdtp`, as `python -m jaxdtp.main`."""

from jaxdtp.main import command

if __name__ == "__main__":
    command()
