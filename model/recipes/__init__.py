"""Training recipes as TOML files; `unimodal train --recipe NAME` reads NAME.toml here."""
