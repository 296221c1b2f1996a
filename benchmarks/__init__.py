"""Speed of the fused unit against its peers; every result is compared with the float64 reference before any timing."""
