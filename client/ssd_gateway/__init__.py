"""A small web service in front of Triton: a picture in over HTTP, boxes out as JSON or drawn; and a page for people.

It holds no model logic: `ssd_client` turns pictures into tensors and boxes back into pixels.
"""
