"""From a graph to the objects of a cluster: plain data in, plain data out. No cluster, no network, no clock."""
