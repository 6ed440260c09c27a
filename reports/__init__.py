"""Result JSON to figures to one HTML page. Reads no model file."""
