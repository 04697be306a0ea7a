"""Changes to what was read: `splicing` replaces a span, `composing` joins segments, both by `replaying` tokens."""
