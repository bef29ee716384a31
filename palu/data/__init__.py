"""Text and spans to tokens and labels."""
