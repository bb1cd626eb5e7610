"""From the call to the launch: checks, plan, compilation, caches, devices, graphs, gradients."""
