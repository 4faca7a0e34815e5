"""What is measured and shown of a run while it trains; nothing here changes what is trained."""
