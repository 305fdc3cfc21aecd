"""A graph's service simulated before it is built: arrivals, queues, autoscalers, and the smallest numbers that hold a target."""
