"""What `update` returns: tensors that know their layer, show it the queries of attention, and answer from the codes."""
