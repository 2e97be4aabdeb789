"""Native sparse attention in other libraries, each in a module of its own that is imported by name:
`from nsa_triton.integrations.hf import swap_attention`."""
