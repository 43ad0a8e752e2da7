package build

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
)

// extentReader finds the data of files in ext4. The library that lists the files takes a hole for data: it reads the wrong place of the disk, or nothing, for
// ever. What a file holds is read here, block by block as its inode says.
type extentReader struct {
	w              *watched
	blockSize      int64
	descriptors    int64 // where the table of the groups is, in bytes
	descriptorSize int64
	inodesPerGroup int64
	inodeSize      int64
	data, zeros    []byte
}

const (
	ext4Has64Bit    = 0x80 // feature: descriptors of groups have a size of their own, and high halves of block numbers
	ext4MetaGroups  = 0x10 // feature: they are all over the disk
	ext4UsesExtents = 0x80000
	ext4Magic       = 0xf30a // of a node of extents
	ext4Unwritten   = 1 << 15
	ext4MaxDepth    = 5
)

// newExtentReader makes one of an image's first 2048 bytes.
func newExtentReader(w *watched, head []byte) (*extentReader, error) {
	sb := head[1024:]
	number := func(at int) int64 { return int64(binary.LittleEndian.Uint32(sb[at:])) }
	if number(0x18) > 6 {
		return nil, fmt.Errorf("blocks of 2^%d KiB", number(0x18))
	}
	e := &extentReader{w: w, blockSize: 1024 << number(0x18), descriptorSize: 32, inodesPerGroup: number(0x28), inodeSize: int64(binary.LittleEndian.Uint16(sb[0x58:]))}
	e.descriptors = (number(0x14) + 1) * e.blockSize
	features := number(0x60)
	if features&ext4Has64Bit != 0 {
		e.descriptorSize = int64(binary.LittleEndian.Uint16(sb[0xfe:]))
	}
	if features&ext4MetaGroups != 0 || e.inodesPerGroup == 0 || e.inodeSize < 128 || e.descriptorSize < 32 {
		return nil, fmt.Errorf("a layout of groups that is not known here: features %#x, inodes of %d bytes, descriptors of %d", features, e.inodeSize, e.descriptorSize)
	}
	e.data, e.zeros = make([]byte, 1<<20), make([]byte, 1<<20)
	return e, nil
}

// copyTo writes what an inode's file of so many bytes holds.
func (e *extentReader) copyTo(ctx context.Context, to io.Writer, inode uint32, size int64) error {
	if size == 0 {
		return nil
	}
	group, index := int64(inode-1)/e.inodesPerGroup, int64(inode-1)%e.inodesPerGroup
	d := make([]byte, e.descriptorSize)
	if err := readAt(e.w.img, e.descriptors+group*e.descriptorSize, d); err != nil {
		return fmt.Errorf("reading the descriptor of group %d: %w", group, err)
	}
	table := uint64(binary.LittleEndian.Uint32(d[8:]))
	if len(d) >= 64 {
		table |= uint64(binary.LittleEndian.Uint32(d[0x28:])) << 32
	}
	at, err := e.place(table)
	if err != nil {
		return err
	}
	node := make([]byte, 128)
	if err := readAt(e.w.img, at+index*e.inodeSize, node); err != nil {
		return fmt.Errorf("reading inode %d: %w", inode, err)
	}
	if binary.LittleEndian.Uint32(node[0x20:])&ext4UsesExtents == 0 {
		return fmt.Errorf("inode %d keeps its data in another way than in extents", inode)
	}
	c := &extentCopy{extentReader: e, ctx: ctx, to: to, size: size, nodes: e.w.img.Size/e.blockSize + 1}
	if err := c.node(node[0x28:0x28+60], ext4MaxDepth+1); err != nil {
		return fmt.Errorf("inode %d: %w", inode, err)
	}
	return c.hole(size)
}

// place is where a block is in the image, in bytes.
func (e *extentReader) place(block uint64) (int64, error) {
	if block >= uint64(e.w.img.Size/e.blockSize) {
		return 0, fmt.Errorf("block %d is beyond the image", block)
	}
	return int64(block) * e.blockSize, nil
}

// extentCopy goes through the extents of one file.
type extentCopy struct {
	*extentReader
	ctx   context.Context
	to    io.Writer
	size  int64
	done  int64 // bytes written
	nodes int64 // that may still be read: each is a block, and belongs to one file
}

// node writes what a node of the tree leads to. above is the depth of the node that led to it.
func (c *extentCopy) node(b []byte, above int) error {
	entries, depth := int(binary.LittleEndian.Uint16(b[2:])), int(binary.LittleEndian.Uint16(b[6:]))
	if c.nodes--; binary.LittleEndian.Uint16(b) != ext4Magic || depth >= above || 12+12*entries > len(b) || c.nodes < 0 {
		return fmt.Errorf("its extents are damaged after byte %d of the file", c.done)
	}
	for i := range entries {
		x := b[12+12*i:]
		first := int64(binary.LittleEndian.Uint32(x)) * c.blockSize
		if first >= c.size && depth == 0 {
			return nil // room beyond the end of the file
		}
		if depth > 0 {
			at, err := c.place(uint64(binary.LittleEndian.Uint32(x[4:])) | uint64(binary.LittleEndian.Uint16(x[8:]))<<32)
			if err != nil {
				return err
			}
			child := make([]byte, c.blockSize)
			if err := readAt(c.w.img, at, child); err != nil {
				return err
			}
			if err := c.node(child, depth); err != nil {
				return err
			}
			continue
		}
		if first < c.done {
			return fmt.Errorf("its extents are damaged: byte %d of the file is in two of them", first)
		}
		if err := c.hole(first); err != nil {
			return err
		}
		n := int64(binary.LittleEndian.Uint16(x[4:]))
		if n > ext4Unwritten { // it has its place on the disk, and reads as zeros
			if err := c.hole(min(c.size, first+(n-ext4Unwritten)*c.blockSize)); err != nil {
				return err
			}
			continue
		}
		at, err := c.place(uint64(binary.LittleEndian.Uint32(x[8:])) | uint64(binary.LittleEndian.Uint16(x[6:]))<<32)
		if err != nil {
			return err
		}
		for left := min(n*c.blockSize, c.size-first); left > 0; {
			data := c.data[:min(left, int64(len(c.data)))]
			if err := readAt(Image{Data: c.w}, at, data); err != nil { // seen by c.w, as the tree is not
				return err
			}
			if err := c.write(data); err != nil {
				return err
			}
			at, left = at+int64(len(data)), left-int64(len(data))
		}
	}
	return nil
}

// hole writes zeros up to a byte of the file.
func (c *extentCopy) hole(end int64) error {
	for c.done < end {
		if err := c.write(c.zeros[:min(end-c.done, int64(len(c.zeros)))]); err != nil {
			return err
		}
	}
	return nil
}

func (c *extentCopy) write(data []byte) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	c.done += int64(len(data))
	_, err := c.to.Write(data)
	return err
}
