"""Moves bytes between ranks: transports, and the channels that exchange bucket payloads."""
