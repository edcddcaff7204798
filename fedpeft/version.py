"""The version of fedpeft, readable where the package is not installed (inside a Flower app bundle)."""

VERSION = "0.1.0"
