"""Number formats for the probabilities of attentions."""
