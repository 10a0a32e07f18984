"""Reading a full-precision model as a graph: tracing it, and recognising the operations that have an integer form."""
