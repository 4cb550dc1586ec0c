"""How adapters become one."""
