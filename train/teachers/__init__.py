"""Captioners that teach others: word by word, or by what they say of the photos."""
