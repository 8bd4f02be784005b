"""The subcommands of `ds-gradprune`. Each is imported when it is called."""
