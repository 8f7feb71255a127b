"""What is sent to a simulated cluster: synthetic arrivals, traces, and what they ask of engines."""
