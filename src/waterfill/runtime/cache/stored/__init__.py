"""A cache as a file to keep or send: `saving`, `loading`, quality `levels`, and the `link` that picks among them."""
