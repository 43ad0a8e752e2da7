package trusttest

import (
	"bytes"
	"encoding/binary"
)

// Section is a section of a PE file.
type Section struct {
	Name string
	Data []byte
}

// Kernel makes a PE file with these sections, as small as a reader of unified kernel images takes it. It cannot boot.
func Kernel(sections ...Section) []byte {
	const align = 512
	round := func(n int) int { return (n + align - 1) / align * align }
	var b bytes.Buffer
	put := func(v ...any) {
		for _, x := range v {
			binary.Write(&b, binary.LittleEndian, x)
		}
	}
	b.WriteString("MZ")
	b.Write(make([]byte, 58))
	put(uint32(64))
	b.WriteString("PE\x00\x00")
	put(uint16(0x8664), uint16(len(sections)), uint32(0), uint32(0), uint32(0), uint16(0), uint16(0x2022))
	at, address := round(b.Len()+40*len(sections)), 4096
	for _, s := range sections {
		var name [8]byte
		copy(name[:], s.Name)
		put(name, uint32(len(s.Data)), uint32(address), uint32(round(len(s.Data))), uint32(at), uint32(0), uint32(0), uint16(0), uint16(0), uint32(0x40000040))
		at += round(len(s.Data))
		address += (len(s.Data) + 4095) / 4096 * 4096
	}
	b.Write(make([]byte, round(b.Len())-b.Len()))
	for _, s := range sections {
		b.Write(s.Data)
		b.Write(make([]byte, round(len(s.Data))-len(s.Data)))
	}
	return b.Bytes()
}
