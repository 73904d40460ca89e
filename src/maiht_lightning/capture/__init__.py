"""A model run block by block: block inputs, hidden states, Gram matrices of the linear layers' inputs."""
