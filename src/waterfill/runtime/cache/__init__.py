"""The KV cache to a named size: blocks of tokens coded once, under transformers' own interface.

Where to look: `cache` is what users hold; `layer` is what transformers calls; `store` is what a layer
remembers; `states` is what attention gets instead of tensors, and `attending` how it reads them;
`methods` has a file for each way to code a block.
Edits: `splicing` changes what was read, `composing` builds a past from segments, both by `replaying` tokens
over what is held; `patching` cuts a store open. `guard` measures harm (`probing`) and has layers fall back.
"""
