"""The KV cache to a named size: blocks of tokens coded once, under transformers' own interface.

Where to look: `cache` is what users hold; `layer` is what transformers calls; `method` is the contract of a
way to code a block, and `methods` has a file for each. `held` is what a layer remembers and how attention
reads it; `fitting` finds what text needs and splits the bytes; `stored` writes a cache to a file and reads it;
`editing` changes what was read. `guard` measures harm and has layers fall back; `patching` cuts a store open.
"""
