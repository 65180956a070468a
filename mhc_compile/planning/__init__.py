"""Decisions for one captured graph: sites, graph breaks, parameters, sizes."""
