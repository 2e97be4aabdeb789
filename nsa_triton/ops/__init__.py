"""One folder per operator family; the folders never import one another."""
