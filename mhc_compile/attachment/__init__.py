"""What sits on the model: the parameters of sites, and the sentinels that watch over them."""
