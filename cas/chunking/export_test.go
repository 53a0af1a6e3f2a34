package chunking

// NewLevel is a Chunker with another normalization and any sizes.
func NewLevel(smallest, average, largest int, seed uint64, level int) *Chunker {
	return newChunker(smallest, average, largest, seed, level)
}

// Fingerprint is Cut with the fingerprint at the end of the chunk.
func (c *Chunker) Fingerprint(data []byte) (n int, fingerprint uint64) { return c.cut(data) }
