"""One function per flow: what the commands, the studio and `rite_diffusion` itself call."""
