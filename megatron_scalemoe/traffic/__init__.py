"""What the router did: recorded or synthetic routing traces, and the traffic matrices that follow from them."""
