"""LoRAs, textual inversions and IP-Adapters: read their files and apply them to the networks."""
