"""fluxkiln: FLUX.1 on the GPU you own, as fast as it can go, with proof of what ran."""
