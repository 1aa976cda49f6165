"""The cache of live backends: leases, eviction and closing. It knows neither pytest nor torch."""
