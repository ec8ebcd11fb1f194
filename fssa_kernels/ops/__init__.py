"""One folder per op: api.py (public function, checks, registration), reference.py, backends."""
