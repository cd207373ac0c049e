"""Reading and writing folders of weights, tensor by tensor."""
