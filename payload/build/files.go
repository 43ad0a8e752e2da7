package build

import "context"

// pair is a file of the new image, and what it was in the old one.
type pair struct {
	new, old []int // blocks, in the order of the file
}

func pairs(ctx context.Context, old, new Image) []pair { return nil }
