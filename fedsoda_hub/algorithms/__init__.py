"""The paper's algorithms: tensors in, tensors out; one idea a file."""
