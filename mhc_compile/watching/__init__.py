"""What training has made of a model: mixing matrices, similarity of streams, gain; as figures, pages, Trainer logs."""
