"""Reading and copying FX graphs: what several passes share."""
