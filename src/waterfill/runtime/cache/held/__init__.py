"""What a layer remembers: `store` grows and crops it; attention gets `states`, and `attending` reads them."""
