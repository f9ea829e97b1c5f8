"""Run UNets and ControlNets, whole or in strips of rows, and estimate their cost."""
